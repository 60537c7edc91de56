"""What users would run instead: the handlers that the serving benchmark compares Convoy with."""
