"""The process: settings, workers, the stop, limits, metrics, OpenAPI."""
