//! How many processes take part in a command, and where they come from.

use clap::{Args, ValueEnum};

/// Several processes.
#[derive(Args)]
pub(super) struct RanksArgs {
    /// Where the ranks come from: auto, the launcher (mpirun, srun, torchrun) if there is one; none, this process alone; mpi;
    /// tcp, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    #[arg(long, value_name = "FROM", value_enum, default_value = "auto")]
    pub(super) ranks: RanksFrom,
    /// Seconds after which the run ends when a rank sends no sign of life, or keeps the others waiting.
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    pub(super) rank_timeout: f64,
}

/// Where ranks come from.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum RanksFrom {
    Auto,
    None,
    Mpi,
    Tcp,
}
