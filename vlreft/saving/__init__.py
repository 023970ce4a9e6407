"""The files of an adapter: written, read strictly, fetched, pushed, and taken over from other libraries."""
