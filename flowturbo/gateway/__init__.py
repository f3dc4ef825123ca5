"""An HTTP gateway: the OpenAI images API, and a web page. It is a client of the service."""
