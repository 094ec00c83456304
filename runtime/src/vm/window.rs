//! Where each layer lies in a pod's layer window. ◇ Pure.
//!
//! Called by `vm::pod` before it has the VMM map a layer. Invariants: extents never overlap, never move, and are aligned
//! to [`ALIGN`]; a layer that two containers share has one extent.

use atoll_spec::guest::Layer;
use atoll_spec::vm::{LAYER_WINDOW_BYTES, LAYER_WINDOW_EXTENTS};
use std::collections::BTreeMap;

/// Extents start at multiples of this, so that neighbours share no page of the guest's cache.
const ALIGN: u64 = 1 << 20;

/// The layers that a VM has, by digest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Window {
    extents: BTreeMap<String, Layer>,
    end: u64,
}

/// An extent, and whether the VMM has yet to map it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Where.
    pub layer: Layer,
    /// Not in the window before.
    pub new: bool,
}

impl Window {
    /// Rebuilds the window of a VM that runs already.
    pub fn restore(extents: BTreeMap<String, Layer>) -> Self {
        let end = extents.values().map(|l| l.offset + l.length).max().unwrap_or(0);
        Self { extents, end }
    }

    /// What [`Window::restore`] takes.
    pub fn extents(&self) -> &BTreeMap<String, Layer> {
        &self.extents
    }

    /// The extent of a layer of `length` bytes.
    pub fn place(&mut self, digest: &str, length: u64) -> Result<Placed, String> {
        if let Some(&layer) = self.extents.get(digest) {
            return Ok(Placed { layer, new: false });
        }
        if self.extents.len() >= LAYER_WINDOW_EXTENTS {
            return Err(format!(
                "the images of this pod have more than {LAYER_WINDOW_EXTENTS} layers: squash some of them"
            ));
        }
        let length = length.max(1).next_multiple_of(4096);
        let offset = self.end.next_multiple_of(ALIGN);
        let end = offset.checked_add(length).filter(|end| *end <= LAYER_WINDOW_BYTES);
        self.end = end.ok_or("the images of this pod have more than 1 TiB of layers")?;
        let layer = Layer { offset, length };
        self.extents.insert(digest.to_owned(), layer);
        Ok(Placed { layer, new: true })
    }

    /// Takes back a layer that the VMM could not map.
    pub fn withdraw(&mut self, digest: &str) {
        self.extents.remove(digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn extents_do_not_overlap(lengths in proptest::collection::vec(0u64..1 << 34, 0..300)) {
            let mut window = Window::default();
            let mut placed: Vec<Layer> = Vec::new();
            for (n, length) in lengths.into_iter().enumerate() {
                match window.place(&format!("sha256:{n}"), length) {
                    Ok(p) => {
                        prop_assert!(p.new && p.layer.offset % 4096 == 0 && p.layer.length % 4096 == 0);
                        prop_assert!(p.layer.offset + p.layer.length <= LAYER_WINDOW_BYTES);
                        prop_assert!(placed.last().is_none_or(|l| l.offset + l.length <= p.layer.offset));
                        placed.push(p.layer);
                    }
                    Err(_) => prop_assert!(n >= 63),
                }
            }
            let again = Window::restore(window.extents().clone());
            prop_assert_eq!(again.extents(), window.extents());
        }
    }

    #[test]
    fn a_shared_layer_is_placed_once() {
        let mut window = Window::default();
        let first = window.place("a", 5000).unwrap();
        assert_eq!(first, Placed { layer: Layer { offset: 0, length: 8192 }, new: true });
        assert_eq!(window.place("a", 5000).unwrap(), Placed { layer: first.layer, new: false });
        assert_eq!(window.place("b", 1).unwrap().layer.offset, 1 << 20);
    }
}
