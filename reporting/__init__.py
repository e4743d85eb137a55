"""Reports of grids: rows, statistics, tables, figures, pages; and the report on corruptions of an evaluation."""
