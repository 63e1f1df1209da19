"""The token loop: requests, cache slots, plans, text streams and speculation."""
