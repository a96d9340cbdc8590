"""The commands of `python -m torch_csb`; each module has add_arguments(parser) and run(options), which returns the
exit status. What goes wrong is a ValueError, OSError or ImportError whose message says what to do."""
