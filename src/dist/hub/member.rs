//! What the hub knows about a rank.

use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// Where a rank runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::dist) struct Member {
    pub host: String,
    /// Name of its node, which is its host, or the host and the number of torchrun's agent on it. Ranks on one node
    /// exchange data faster than ranks on different nodes.
    pub node: String,
    pub pid: u32,
    /// The cores that the process may use, as the system lists them.
    pub cores: String,
}

/// See [`Collective::ranks_per_node`](crate::dist::Collective::ranks_per_node).
pub(in crate::dist) fn ranks_per_node(members: &[Member]) -> usize {
    let first = &members[0].node;
    let own = members.iter().take_while(|m| m.node == *first).count();
    let groups = || members.chunks(own);
    let alike =
        |group: &[Member]| group.len() == own && group.iter().all(|m| m.node == group[0].node);
    let names: HashSet<&str> = groups().map(|group| &*group[0].node).collect();
    match own.is_power_of_two() && groups().all(alike) && names.len() == groups().count() {
        true => own,
        false => members.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_count_if_they_have_the_same_number_of_consecutive_ranks_and_it_is_a_power_of_two() {
        let cases: [(&str, usize); 9] = [
            ("a", 1),
            ("a a", 2),
            ("a b c", 1),
            ("a a b b c c", 2),
            ("a a a a b b b b", 4),
            // Not the same number, not consecutive, no power of two.
            ("a a b", 3),
            ("a b b", 3),
            ("a a b b a a", 6),
            ("a a a b b b", 6),
        ];
        let member = |node: &str| Member {
            host: node.into(),
            node: node.into(),
            pid: 1,
            cores: String::new(),
        };
        for (nodes, expected) in cases {
            let members: Vec<Member> = nodes.split(' ').map(member).collect();
            assert_eq!(ranks_per_node(&members), expected, "{nodes}");
        }
    }
}
