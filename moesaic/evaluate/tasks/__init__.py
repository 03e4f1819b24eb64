"""The tasks that come with moesaic: one YAML file each, in lm_eval's terms, and where their records come from.

registry.py finds and loads them, records.py reads the forms in which a task's records are passed around.
"""
