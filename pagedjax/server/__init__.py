"""HTTP: the OpenAI API, the /generate demo API and metrics around one engine. Imported by `pagedjax serve` alone."""
