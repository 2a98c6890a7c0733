"""An OpenAI-compatible server: an engine of continuous batching, and the HTTP in front of it."""
