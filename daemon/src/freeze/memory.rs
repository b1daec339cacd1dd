//! Memory for the last blocks, taken before the freeze: pure.

use crate::bitmap::Extent;

/// Bytes of a segment: what is given back to the system at once.
const SEGMENT_BYTES: usize = 1 << 20;

/// Room for so many bytes, really there (not only promised by the kernel).
pub(super) struct Memory {
    segments: Vec<Vec<u8>>,
    used: usize,
    pieces: Vec<(Extent, usize)>,
}

impl Memory {
    /// Takes at least `bytes`; `None` if there is not so much.
    pub(super) fn take(bytes: u64) -> Option<Self> {
        let count = usize::try_from(bytes.div_ceil(SEGMENT_BYTES as u64)).ok()?;
        let mut segments = Vec::new();
        segments.try_reserve_exact(count).ok()?;
        for _ in 0..count {
            let mut segment = Vec::new();
            segment.try_reserve_exact(SEGMENT_BYTES).ok()?;
            // Not zero: pages of zeros are made only when they are written to, and that would be in the freeze.
            segment.resize(SEGMENT_BYTES, 1);
            segments.push(segment);
        }
        Some(Self { segments, used: 0, pieces: Vec::new() })
    }

    /// Keeps the bytes of an extent; false if they do not fit.
    pub(super) fn keep(&mut self, extent: Extent, data: &[u8]) -> bool {
        if self.segments.len() * SEGMENT_BYTES - self.used < data.len() {
            return false;
        }
        let mut rest = data;
        while !rest.is_empty() {
            let Some(segment) = self.segments.get_mut(self.used / SEGMENT_BYTES) else { return false };
            let Some(room) = segment.get_mut(self.used % SEGMENT_BYTES..) else { return false };
            let (now, later) = rest.split_at(rest.len().min(room.len()));
            room.iter_mut().zip(now).for_each(|(to, from)| *to = *from);
            self.used += now.len();
            rest = later;
        }
        self.pieces.push((extent, data.len()));
        true
    }

    /// The kept extents with their bytes; each segment is given back as soon as it is copied.
    pub(super) fn into_pieces(self) -> Vec<(Extent, Vec<u8>)> {
        let mut segments = self.segments.into_iter();
        let mut segment: std::vec::IntoIter<u8> = Vec::new().into_iter();
        let mut pieces = Vec::with_capacity(self.pieces.len());
        for (extent, len) in self.pieces {
            let mut data = Vec::with_capacity(len);
            while data.len() < len {
                let part = segment.as_slice();
                let take = part.len().min(len - data.len());
                data.extend_from_slice(part.get(..take).unwrap_or_default());
                if take > 0 {
                    segment.nth(take - 1);
                }
                if data.len() < len {
                    match segments.next() {
                        Some(next) => segment = next.into_iter(),
                        None => break,
                    }
                }
            }
            pieces.push((extent, data));
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut memory = Memory::take(1).unwrap();
        let extent = Extent { first: 0, count: 1 };
        assert!(memory.keep(extent, &vec![1; SEGMENT_BYTES - 1]));
        assert!(!memory.keep(extent, &[1, 2]));
        assert!(memory.keep(extent, &[7]));
        assert_eq!(
            memory.into_pieces().iter().map(|p| p.1.len()).collect::<Vec<_>>(),
            [SEGMENT_BYTES - 1, 1]
        );
        assert!(Memory::take(u64::MAX).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_kept_comes_back(lens in proptest::collection::vec(1usize..700_000, 0..8)) {
            let mut memory = Memory::take(lens.iter().sum::<usize>() as u64).unwrap();
            let piece = |i: usize, len: usize| {
                let mut data = vec![0; len];
                blake3::Hasher::new().update(&[i as u8]).finalize_xof().fill(&mut data);
                (Extent { first: i as u64, count: 1 }, data)
            };
            let want: Vec<_> = lens.iter().enumerate().map(|(i, len)| piece(i, *len)).collect();
            for (extent, data) in &want { prop_assert!(memory.keep(*extent, data)); }
            prop_assert!(memory.into_pieces() == want);
        }
    }
}
