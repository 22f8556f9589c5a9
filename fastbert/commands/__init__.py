"""The commands of `fastbert` that have a page of options each."""
