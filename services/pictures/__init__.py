"""Decoding and re-encoding of uploaded pictures in one thread, with bounded uploads and a bounded queue."""
