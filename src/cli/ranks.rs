//! The arguments that select the ranks of a command.

use clap::{Args, ValueEnum};

/// Arguments of commands that run on several processes.
#[derive(Args)]
pub(super) struct RanksArgs {
    /// How to find the ranks: auto, from the launcher (mpirun, srun, torchrun) if there is one; none, only this
    /// process; mpi; tcp, from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    #[arg(long, value_name = "FROM", value_enum, default_value = "auto")]
    pub(super) ranks: RanksFrom,
    /// Time limit in seconds: the run ends if a rank sends no heartbeat, or keeps the others waiting, for longer than
    /// this.
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    pub(super) rank_timeout: f64,
}

/// How ranks are found.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum RanksFrom {
    Auto,
    None,
    Mpi,
    Tcp,
}
