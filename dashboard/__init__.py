"""The web pages, which use the websocket and the REST API as any other client does."""
