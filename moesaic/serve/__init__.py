"""Serving: an engine that runs many requests at once, and a server that speaks OpenAI's protocol."""
