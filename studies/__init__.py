"""Studies: what is compared, how it is run, what came of it.

A study is a file in ``definitions/``; ``python -m studies NAME`` launches its runs and appends a line for each to
``results/NAME.jsonl``; ``python -m studies.report`` renders ``docs/results.md`` from these lines alone.
"""
