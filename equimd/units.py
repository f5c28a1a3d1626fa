"""Units of equimd (eV, Å, amu, fs) and the only conversion factors in the package.

Every constant converts *from* the unit it names *to* equimd's unit by multiplication; CODATA 2018, as used by ASE and
OpenMM 8.
"""

ELEMENTARY_CHARGE_C = 1.602176634e-19
AVOGADRO = 6.02214076e23

EV = 1.0
HARTREE = 27.211386245988
KJ_PER_MOL = 1000.0 / (ELEMENTARY_CHARGE_C * AVOGADRO)
KCAL_PER_MOL = 4.184 * KJ_PER_MOL
ANGSTROM = 1.0
BOHR = 0.529177210903
NM = 10.0
GPA = 1e9 * 1e-30 / ELEMENTARY_CHARGE_C
KBAR = 0.1 * GPA
BAR = 1e-4 * GPA
AMU_PER_A3 = 1.66053906660  # of a density, in g/cm³
KB_EV_PER_K = 8.617333262145e-5

ENERGY_UNITS = {"eV": EV, "meV": 1e-3, "Hartree": HARTREE, "kcal/mol": KCAL_PER_MOL, "kJ/mol": KJ_PER_MOL}
LENGTH_UNITS = {"Å": ANGSTROM, "Angstrom": ANGSTROM, "nm": NM, "Bohr": BOHR}
STRESS_UNITS = {"eV/Å³": 1.0, "eV/Angstrom^3": 1.0, "GPa": GPA, "kbar": KBAR, "bar": BAR}

# sqrt(eV / amu) in Å/fs: the velocity unit of ASE is Å per (Å sqrt(amu/eV)); divide by this factor to get ASE's.
ASE_TIME_FS = (1.66053906660e-27 * 1e-20 / ELEMENTARY_CHARGE_C) ** 0.5 * 1e15
