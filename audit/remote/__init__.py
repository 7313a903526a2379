"""Files at URLs: requests with retries, ranged reads, and a bounded local cache."""
