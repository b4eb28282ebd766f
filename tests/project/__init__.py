"""The project itself: imports, documents, requirements, and clean-up after a killed test run."""
