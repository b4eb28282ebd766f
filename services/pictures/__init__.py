"""Decoding and re-encoding of uploaded pictures in one thread, with limits on uploads and on the queue."""
