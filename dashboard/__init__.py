"""The web pages: websocket and REST clients like any other."""
