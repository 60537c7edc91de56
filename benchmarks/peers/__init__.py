"""Simple servers that users could run instead; the serving benchmark compares Convoy with them."""
