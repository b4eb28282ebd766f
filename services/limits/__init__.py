"""Rate limits for requests, and the lock-out that slows down password guessing."""
