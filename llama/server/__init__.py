"""The server: OpenAI's API for one `Llama`, and a chat page."""
