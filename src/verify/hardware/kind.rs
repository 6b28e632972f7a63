//! The kinds of tasks of the hardware check.

/// What a task checks or measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Every problem agrees with its reference, and a second run computes the same bytes.
    Agrees,
    /// A captured and replayed graph computes the bytes of the eager run.
    Replays,
    /// A complete step does not wait, uses the same addresses again, and needs the planned memory; a step with a NaN
    /// changes no state.
    NoHostSync,
    /// Two runs compute the same bytes.
    Determinism,
    /// The loss equals that of the CPU, within a tolerance.
    LossParity,
    /// A step with the NCCL calls of one rank in its graph computes the bytes of a step without them, and is not slower.
    Connects,
    /// On several GPUs, two runs compute the same bytes; measures how much faster they are than one GPU.
    Scales,
    /// `compute-sanitizer --tool memcheck` finds no errors.
    Memcheck,
    /// The speed of complete steps.
    Throughput,
    /// A killed run continues from its checkpoint; measures the cost of saving.
    Resume,
    /// The speed of a kernel; products are compared with cuBLAS.
    Timed,
    /// The benchmark's core set, including peers.
    Bench,
    /// `compute-sanitizer --tool racecheck` finds no errors. It is last because it takes minutes if it does not hang.
    Racecheck,
}

impl Kind {
    /// Returns the first word of the names of its tasks, which is also used in the records.
    pub fn verb(self) -> &'static str {
        match self {
            Kind::Agrees => "agrees",
            Kind::Replays => "replays",
            Kind::NoHostSync => "steady",
            Kind::Determinism => "repeats",
            Kind::LossParity => "learns",
            Kind::Connects => "connects",
            Kind::Scales => "scales",
            Kind::Memcheck => "memcheck",
            Kind::Throughput => "trains",
            Kind::Resume => "resumes",
            Kind::Timed => "timed",
            Kind::Bench => "bench",
            Kind::Racecheck => "racecheck",
        }
    }
}
