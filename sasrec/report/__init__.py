"""What a study found: results read back and compared, tables, figures, and one page with all of it; without torch."""
