"""Force fields for engines: the only rooms that name a foreign engine's classes or units."""
