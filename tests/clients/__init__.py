"""The Python and the JavaScript client."""
