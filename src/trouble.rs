//! A trouble: what keeps a part of the gateway from working, while it does. The part that fails sets it again
//! and again; it is logged when it changes and when it is over, and `/readyz` shows it.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tracing::{error, info};

/// The present trouble of one part, if it has any.
#[derive(Debug)]
pub(crate) struct TroubleCell {
    /// What does not work meanwhile, for the log.
    began: &'static str,
    /// What works again once it is over, for the log.
    over: &'static str,
    /// Whether there is any: what works sets its success often, and must not wait for the lock then.
    any: AtomicBool,
    text: Mutex<Option<String>>,
}

impl TroubleCell {
    /// No trouble. `began` says what does not work while there is one, `over` that it works again.
    pub(crate) fn new(began: &'static str, over: &'static str) -> Self {
        Self { began, over, any: AtomicBool::new(false), text: Mutex::new(None) }
    }

    /// The present trouble.
    pub(crate) fn current(&self) -> Option<String> {
        if self.is_present() { self.text.lock().clone() } else { None }
    }

    /// Whether there is any. One atomic load.
    pub(crate) fn is_present(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Sets the trouble, or that there is none (any more).
    pub(crate) fn set(&self, trouble: Option<String>) {
        self.set_at(trouble, None);
    }

    /// As [`TroubleCell::set`]; the log says how far a reader of the log has come.
    pub(crate) fn set_at(&self, trouble: Option<String>, cursor: Option<u64>) {
        if trouble.is_none() && !self.is_present() {
            return;
        }
        let mut current = self.text.lock();
        if *current == trouble {
            return;
        }
        match &trouble {
            Some(trouble) => error!(cursor, "{}: {trouble}", self.began),
            None => info!(cursor, "{}", self.over),
        }
        self.any.store(trouble.is_some(), Ordering::Release);
        *current = trouble;
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Lines {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    #[test]
    fn a_trouble_is_logged_when_it_changes_and_when_it_is_over() {
        let lines = Lines::default();
        let subscriber = tracing_subscriber::fmt().with_writer(lines.clone()).without_time().with_ansi(false);
        let trouble = TroubleCell::new("nothing is written", "it is written again");
        tracing::subscriber::with_default(subscriber.finish(), || {
            trouble.set(None);
            trouble.set(Some("the disk is full".to_owned()));
            trouble.set(Some("the disk is full".to_owned()));
            assert_eq!(trouble.current().as_deref(), Some("the disk is full"));
            trouble.set_at(Some("the disk is gone".to_owned()), Some(7));
            assert!(trouble.is_present());
            trouble.set(None);
            trouble.set(None);
        });
        assert_eq!((trouble.current(), trouble.is_present()), (None, false));
        let text = String::from_utf8(lines.0.lock().clone()).expect("UTF-8");
        let said: Vec<_> =
            text.lines().map(|line| line.split_once("trouble: ").expect("a target").1).collect();
        assert_eq!(
            said,
            [
                "nothing is written: the disk is full",
                "nothing is written: the disk is gone cursor=7",
                "it is written again"
            ]
        );
    }
}
