"""A small GPT learns real text with dense and with top-k attention, and attention is timed: the demo as a library.

`session` runs it and fills a `report`; `tables` and `plots` show that. The command is `sparse_attn.cli.demo`.
"""
