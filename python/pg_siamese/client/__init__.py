"""What runs beside a connection to the database: load, query, register."""
