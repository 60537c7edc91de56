"""The parts of HTTP that all protocols share: bodies, errors, and routes that do not classify."""
