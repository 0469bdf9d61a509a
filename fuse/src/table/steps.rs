//! The arrows between two steps of the protocol: nothing in a build, the places to die in tests.

/// Marks that the step before it is complete and the one after it has not begun.
#[cfg(not(test))]
#[inline]
pub(crate) fn arrow(_name: &'static str) {}

#[cfg(test)]
pub(crate) use hooked::{arrow, with_hook};

#[cfg(test)]
mod hooked {
    use std::{cell::RefCell, rc::Rc};

    type Hook = Rc<dyn Fn(&'static str)>;

    thread_local! {
        static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    pub(crate) fn arrow(name: &'static str) {
        let hook = HOOK.with_borrow(Clone::clone);
        if let Some(hook) = hook {
            hook(name);
        }
    }

    /// Runs `body` on this thread with `hook` called at each arrow.
    pub(crate) fn with_hook<T>(hook: Hook, body: impl FnOnce() -> T) -> T {
        HOOK.set(Some(hook));
        let result = body();
        HOOK.set(None);
        result
    }
}
