"""One self-contained HTML page about a run, and one about several: inline SVG and images, no network."""
