"""What all protocols share of HTTP: bodies, errors, and the routes beside classification."""
