"""The shadow: the challenger scores copies of requests in a process of low priority.

Workers import ``service.shadow.client`` only. No request waits for the shadow.
"""
