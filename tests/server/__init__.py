"""The server process: settings, workers, stopping, limits, metrics and OpenAPI."""
