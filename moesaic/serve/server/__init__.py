"""The HTTP server: OpenAI's protocol and a few endpoints more, before an AsyncEngine.

app assembles it, run starts and ends it; requests says what may be asked, answers what is answered, responses both for
the Responses API, jobs makes of the one what the engine is asked, generation of its outputs the other, connection waits
for the client, admission decides who waits, gate guards every request, metrics counts.
"""
