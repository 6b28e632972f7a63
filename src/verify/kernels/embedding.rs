//! Checks token embedding (`kernels/embedding.cu`): rows and their order exactly, gradients against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random};
use super::operands::exact;
use super::{BOTH, Buffer, Case, Problem, each, exactly, launch_of, pairs, values};
use crate::kernels::{EmbeddingForward, EmbeddingGradient, EmbeddingOrder};
use half::bf16;

/// The distribution of the token ids.
#[derive(Clone, Copy, Debug)]
pub enum Ids {
    /// Uniform over the vocabulary.
    Uniform,
    /// Half of the tokens have the same id, so that its run extends over many blocks.
    OneOften,
    /// Some ids are not in the table.
    SomeOutside,
}
use Ids::{OneOften, SomeOutside, Uniform};

fn ids(of: Ids, tokens: usize, vocabulary: usize) -> Vec<i32> {
    let mut random = Random((tokens * 7 + vocabulary) as u64);
    let often = random.below(vocabulary) as i32;
    let one = |t: usize| match of {
        OneOften if random.below(2) == 0 => often,
        SomeOutside if t % 5 == 1 => [-1, vocabulary as i32, i32::MAX][t % 3],
        _ => random.below(vocabulary) as i32,
    };
    (0..tokens).map(one).collect()
}

/// Returns the id, or V if it is not in the table.
fn key(id: i32, vocabulary: usize) -> i32 {
    match (0..vocabulary as i32).contains(&id) {
        true => id,
        false => vocabulary as i32,
    }
}

/// Returns the launch of `embedding_forward`. Buffers: y, w, ids.
pub fn forward_problem(of: Ids, tokens: usize, vocabulary: usize, hidden: usize) -> Problem {
    let table = Random(5).normals_bf16(vocabulary * hidden);
    let ids = ids(of, tokens, vocabulary);
    Problem {
        label: format!("{of:?}, T {tokens}, V {vocabulary}, D {hidden}"),
        buffers: vec![
            Buffer::output("y", 2 * tokens * hidden),
            Buffer::input("w", &table),
            Buffer::input("ids", &ids),
        ],
        launch: launch_of!(EmbeddingForward { y, w, ids; tokens, vocabulary, hidden }),
        judge: Box::new(move |out| {
            exactly::<u16>("y", &out[0], |i| {
                match key(ids[i / hidden], vocabulary) as usize {
                    id if id < vocabulary => table[id * hidden + i % hidden].to_bits(),
                    _ => bf16::NAN.to_bits(),
                }
            })
        }),
    }
}

/// Returns the launch of `embedding_order`: the first one, or one after a stable sort by the lowest byte. Buffers: order,
/// keys, previous, row_token, ids.
pub fn order_problem(tokens: usize, vocabulary: usize, first: bool, whole: bool) -> Problem {
    let ids = ids(SomeOutside, tokens, vocabulary);
    let mut random = Random(tokens as u64);
    let mut shuffled = || {
        let mut items: Vec<i32> = (0..tokens as i32).collect();
        random.shuffle(&mut items);
        items
    };
    let (previous, row_token) = (shuffled(), shuffled());
    let shift = if first { 0 } else { 8 };
    let order: Vec<i32> = match first {
        true => (0..tokens as i32).collect(),
        false => row_token.iter().map(|&r| previous[r as usize]).collect(),
    };
    let keys: Vec<i32> = order
        .iter()
        .map(|&t| key(ids[t as usize], vocabulary) >> shift)
        .map(|key| if whole { key } else { key & 255 })
        .collect();
    Problem {
        label: format!("T {tokens}, V {vocabulary}, first {first}, whole {whole}"),
        buffers: vec![
            Buffer::output("order", 4 * tokens),
            Buffer::output("keys", 4 * tokens),
            Buffer::input("previous", &previous),
            Buffer::input("row_token", &row_token),
            Buffer::input("ids", &ids),
        ],
        launch: launch_of!(EmbeddingOrder {
            order, keys, previous if !first, row_token if !first, ids;
            tokens, vocabulary, shift, whole,
        }),
        judge: Box::new(move |out| {
            let mut errors = exactly::<i32>("order", &out[0], |i| order[i])?;
            errors.merge(exactly::<i32>("keys", &out[1], |i| keys[i])?);
            Ok(errors)
        }),
    }
}

/// Returns the launch of `embedding_gradient`. Buffers: dw, parts, dy, order, keys.
pub fn gradient_problem(
    of: Ids,
    [tokens, vocabulary, hidden]: [usize; 3],
    accumulate: bool,
) -> Problem {
    let mut random = Random((tokens + vocabulary) as u64);
    let dy = random.normals_bf16(tokens * hidden);
    let before = random.normals(vocabulary * hidden);
    let ids = ids(of, tokens, vocabulary);
    let mut order: Vec<i32> = (0..tokens as i32).collect();
    order.sort_by_key(|&t| key(ids[t as usize], vocabulary));
    let keys: Vec<i32> = order
        .iter()
        .map(|&t| key(ids[t as usize], vocabulary))
        .collect();
    let buffers = vec![
        Buffer::added_to("dw", &before, accumulate),
        Buffer::workspace("parts", 4 * tokens.div_ceil(64) * 2 * hidden),
        Buffer::input("dy", &dy),
        Buffer::input("order", &order),
        Buffer::input("keys", &keys),
    ];
    Problem {
        label: format!("{of:?}, T {tokens}, V {vocabulary}, D {hidden}, accumulate {accumulate}"),
        buffers,
        launch: launch_of!(EmbeddingGradient {
            dw, parts, dy, order, keys;
            tokens, vocabulary, hidden, accumulate,
        }),
        judge: Box::new(move |out| {
            // Σ, Σ of magnitudes, and number of terms.
            let mut sums = vec![(0.0, 0.0); vocabulary * hidden];
            let mut terms = vec![0usize; vocabulary];
            for (token, &id) in ids.iter().enumerate() {
                let Some(count) = terms.get_mut(key(id, vocabulary) as usize) else {
                    continue;
                };
                *count += 1;
                for column in 0..hidden {
                    let d = exact(dy[token * hidden + column]);
                    let sum = &mut sums[id as usize * hidden + column];
                    *sum = (sum.0 + d, sum.1 + d.abs());
                }
            }
            Errors::within("dw", &values::<f32>(&out[0]), |i| {
                let (sum, magnitude) = sums[i];
                let old = f64::from(if accumulate { before[i] } else { 0.0 });
                // Number of additions that affect one term: those within its block, then one per block.
                let count = terms[i / hidden];
                let depth = (count.min(64) + count.div_ceil(64) + 2) as f64;
                let bound = F32_ROUNDOFF * (depth * magnitude + (old + sum).abs());
                (old + sum, bound)
            })
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let shapes = [
        [1, 1, 8],
        [67, 300, 72],
        [300, 5, 40],
        [2039, 131, 16],
        [131, 9, 2056],
    ];
    let of_ids = pairs(shapes, [Uniform, OneOften, SomeOutside]);
    let forward = each(of_ids.clone(), |([tokens, vocabulary, hidden], of)| {
        forward_problem(of, tokens, vocabulary, hidden)
    });
    let passes = [(true, false), (false, false), (false, true), (true, true)];
    let order = each(passes, |(first, whole)| {
        order_problem(1031, 70_000, first, whole)
    });
    let gradient = each(pairs(of_ids, BOTH), |((shape, of), accumulate)| {
        gradient_problem(of, shape, accumulate)
    });
    vec![
        Case::small("embedding_forward", "embedding", forward),
        Case::small("embedding_order", "embedding", order),
        Case::small("embedding_gradient", "embedding", gradient),
    ]
}
