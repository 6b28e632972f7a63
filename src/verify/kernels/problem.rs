//! What a case declares: its problems with their buffers, launches and checks.

use super::bound::Bound;
use super::numbers::Errors;
use crate::error::Result;
use crate::kernels::Stream;
use crate::kernels::table::{Row, bytes_of};
use std::sync::{Arc, LazyLock};

/// One buffer of a problem.
pub struct Buffer {
    /// Name, for messages.
    pub name: &'static str,
    /// The content.
    pub content: Content,
}

/// Content of a buffer before the launch, and how it is checked after the launch.
pub enum Content {
    /// Read only.
    Input(Vec<u8>),
    /// A table of this many bytes with addresses of other buffers, read only.
    Table(usize, Fill),
    /// This many poisoned bytes, checked after the launch.
    Output(usize),
    /// Changed in place, checked after the launch.
    Changed(Vec<u8>),
    /// This many poisoned bytes for the kernel's own use.
    Workspace(usize),
}

/// Computes the content of a table from the addresses of the buffers, in the order of the problem's list.
pub type Fill = Box<dyn Fn(&[*mut u8]) -> Vec<u8> + Send + Sync>;

impl Buffer {
    fn new(name: &'static str, content: Content) -> Self {
        Self { name, content }
    }

    /// A table whose rows `fill` computes from the buffers' addresses.
    pub fn table<R: Row>(
        name: &'static str,
        rows: usize,
        fill: impl Fn(&[*mut u8]) -> Vec<R> + Send + Sync + 'static,
    ) -> Self {
        let bytes = rows * size_of::<R>();
        let fill = move |addresses: &[*mut u8]| bytes_of(&fill(addresses)).to_vec();
        Self::new(name, Content::Table(bytes, Box::new(fill)))
    }

    /// A buffer that the kernel only reads.
    pub fn input<T: bytemuck::NoUninit>(name: &'static str, values: &[T]) -> Self {
        Self::new(name, Content::Input(bytemuck::cast_slice(values).to_vec()))
    }
    /// A buffer of this many bytes that the kernel writes.
    pub fn output(name: &'static str, bytes: usize) -> Self {
        Self::new(name, Content::Output(bytes))
    }
    /// A buffer that the kernel changes in place, with its content before the launch.
    pub fn changed<T: bytemuck::NoUninit>(name: &'static str, values: &[T]) -> Self {
        Self::new(
            name,
            Content::Changed(bytemuck::cast_slice(values).to_vec()),
        )
    }

    /// A buffer to which the kernel adds, or, without `accumulate`, which it overwrites whatever it holds.
    pub fn added_to<T: bytemuck::NoUninit>(
        name: &'static str,
        before: &[T],
        accumulate: bool,
    ) -> Self {
        match accumulate {
            true => Self::changed(name, before),
            false => Self::output(name, size_of_val(before)),
        }
    }
    /// A workspace of this many bytes.
    pub fn workspace(name: &'static str, bytes: usize) -> Self {
        Self::new(name, Content::Workspace(bytes))
    }

    /// Returns the size in bytes.
    pub fn bytes(&self) -> usize {
        match &self.content {
            Content::Input(bytes) | Content::Changed(bytes) => bytes.len(),
            Content::Output(bytes) | Content::Workspace(bytes) | Content::Table(bytes, _) => *bytes,
        }
    }
}

/// Launches on the buffers of the problem.
pub type Launch = Box<dyn Fn(&Bound, &Stream) -> Result<()> + Send + Sync>;

/// Checks the content of the outputs and changed buffers, which are in the order of the problem's list.
pub type Judge = Box<dyn Fn(&[Vec<u8>]) -> Result<Errors, String> + Send + Sync>;

/// One launch with its inputs and its reference.
pub struct Problem {
    /// Shape and settings, for messages.
    pub label: String,
    /// The buffers.
    pub buffers: Vec<Buffer>,
    /// The launch.
    pub launch: Launch,
    /// The check of the outputs.
    pub judge: Judge,
}

/// Creates a problem when it is needed, since the inputs of large problems need gigabytes.
pub type MakeProblem = Box<dyn Fn() -> Result<Problem> + Send + Sync>;

/// A named group of problems.
pub struct Case {
    /// Unique name, which is part of the key of a record.
    pub name: String,
    /// The launcher's name in `kernels/routegrad.h`.
    pub launcher: &'static str,
    /// Name of the `.cu` file, without the extension.
    pub source: &'static str,
    /// The problems, each made when it is needed.
    pub problems: Vec<MakeProblem>,
    /// Whether the case is small enough for tools that make a kernel a thousand times slower.
    pub small: bool,
}

impl Case {
    /// The case `LAUNCHER NAME`.
    pub fn new(
        launcher: &'static str,
        source: &'static str,
        name: &str,
        small: bool,
        problems: Vec<MakeProblem>,
    ) -> Self {
        Self {
            name: format!("{launcher} {name}"),
            launcher,
            source,
            problems,
            small,
        }
    }

    /// The case of small problems.
    pub fn small(launcher: &'static str, source: &'static str, problems: Vec<MakeProblem>) -> Self {
        Self::new(launcher, source, "small", true, problems)
    }

    /// The case of problems that cover the rest: large ones, and many.
    pub fn covering(
        launcher: &'static str,
        source: &'static str,
        problems: Vec<MakeProblem>,
    ) -> Self {
        Self::new(launcher, source, "covering", false, problems)
    }

    /// The cases of small and of covering shapes.
    pub fn both<S>(
        launcher: &'static str,
        source: &'static str,
        [small, covering]: [S; 2],
        problems: impl Fn(S) -> Vec<MakeProblem>,
    ) -> Vec<Self> {
        vec![
            Self::small(launcher, source, problems(small)),
            Self::covering(launcher, source, problems(covering)),
        ]
    }
}

/// A problem, or the result of making one.
pub trait Made {
    /// # Errors
    /// When the problem could not be made.
    fn made(self) -> Result<Problem>;
}
impl Made for Problem {
    fn made(self) -> Result<Problem> {
        Ok(self)
    }
}
impl Made for Result<Problem> {
    fn made(self) -> Result<Problem> {
        self
    }
}

/// A copy of a value in which some fields differ: `with!(value; field: other, ...)`.
macro_rules! with {
    ($value:expr; $($field:ident: $other:expr),+) => {{
        let mut copy = $value;
        $( copy.$field = $other; )+
        copy
    }};
}
pub(super) use with;

/// Both settings of a switch.
pub const BOTH: [bool; 2] = [false, true];

/// Returns a problem for each shape.
pub fn each<S, P>(
    shapes: impl IntoIterator<Item = S>,
    make: impl Fn(S) -> P + Clone + Send + Sync + 'static,
) -> Vec<MakeProblem>
where
    S: Clone + Send + Sync + 'static,
    P: Made,
{
    let maker = |shape: S| -> MakeProblem {
        let make = make.clone();
        Box::new(move || make(shape.clone()).made())
    };
    shapes.into_iter().map(maker).collect()
}

/// Returns every pair of an element of `a` and one of `b`, which changes first.
pub fn pairs<A: Clone, B>(
    a: impl IntoIterator<Item = A>,
    b: impl IntoIterator<Item = B> + Clone,
) -> Vec<(A, B)> {
    let with = |a: A| b.clone().into_iter().map(move |b| (a.clone(), b));
    a.into_iter().flat_map(with).collect()
}

/// Returns a problem for each shape and tile. The tiles of a shape share its inputs, which are made when they are first
/// needed.
pub fn sharing<S, I, T>(
    shapes: Vec<S>,
    tiles: &[T],
    inputs: impl Fn(S) -> I + Copy + Send + 'static,
    problem: fn(&Arc<I>, T) -> Problem,
) -> Vec<MakeProblem>
where
    S: Send + 'static,
    I: Send + Sync + 'static,
    T: Clone + Send + Sync + 'static,
{
    let of_shape = |shape: S| {
        let inputs = Arc::new(LazyLock::new(move || Arc::new(inputs(shape))));
        each(tiles.to_vec(), move |tile| problem(&inputs, tile))
    };
    shapes.into_iter().flat_map(of_shape).collect()
}
