"""The bundled toy world: an invented world of facts, and two small models that were trained on it.

generator.py   the world and the text that teaches it      words.py      its names and relations
cases.py       its facts, edits and benchmark records      acceptance.py what the two models must know
material.py    what a study of one of its facts asks       text.txt      the text that C0 of the two models is taken over
weights/       the two models
"""
