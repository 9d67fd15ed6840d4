"""A model for others to talk to: the wire formats of OpenAI and Anthropic over HTTP, and a page for people.

    answers    what is asked, in one form for all wire formats, and its answer as it comes
    reply      token ids -> thinking, text and tool calls, however the ids come in pieces
    openai, anthropic    bodies and events of either format
    app, main  routes, limits, and the process

It is handed an engine and a model's way to write prompts; where they come from, `cli.serving` knows.
"""
