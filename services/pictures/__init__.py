"""Uploaded pictures decoded and encoded anew, in a pool of bounded size."""
