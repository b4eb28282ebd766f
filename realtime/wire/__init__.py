"""The bytes of a frame, and writing them without waiting for the client."""
