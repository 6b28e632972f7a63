//! What the hardware check asks.

/// What is asked of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Every problem agrees with its reference, and a second run gives the same bytes.
    Agrees,
    /// Captured as a graph and replayed, it gives the bytes of the eager run.
    Replays,
    /// A whole step waits for nothing, repeats its addresses, takes the planned memory; with a NaN it leaves no trace.
    NoHostSync,
    /// Two runs give the same bytes.
    Determinism,
    /// The loss is that of the processor.
    LossParity,
    /// A step with NCCL's calls of one rank in its graph gives the bytes of one without, and costs no more.
    Connects,
    /// Several GPUs: the same bytes twice, and how much faster they are than one.
    Scales,
    /// `compute-sanitizer --tool memcheck` finds nothing.
    Memcheck,
    /// How fast whole steps are.
    Throughput,
    /// A run that was killed goes on from its checkpoint, and what saving costs.
    Resume,
    /// How fast a kernel is, products beside cuBLAS.
    Timed,
    /// The benchmark's core set, peers included.
    Bench,
    /// `compute-sanitizer --tool racecheck` finds nothing: last, since it takes minutes where it does not hang.
    Racecheck,
}

impl Kind {
    /// The first word of its tasks' names, in the records too.
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
