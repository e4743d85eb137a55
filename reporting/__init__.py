"""Reports of grids: rows, statistics, tables, figures, pages."""
