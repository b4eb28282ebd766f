"""What an operation is, and everything around it: parsing, rendering, middleware, OpenAPI."""
