"""AMX instructions on CPUs without them: a library to preload, how it is built, and what it counted."""
