"""The networks of docs/works-with.md, what is tried on each, and the page."""
