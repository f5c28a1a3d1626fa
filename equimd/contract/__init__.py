"""What every calculator promises, whatever makes its energies: measured on plain structures, without any engine."""
