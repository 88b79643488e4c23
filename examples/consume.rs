//! Follows a datasource's validated stream on NATS with a durable consumer: every record once and in order,
//! also those from while this program was away.
//!
//! ```text
//! NATS_URL=nats://127.0.0.1:4222 cargo run --example consume -- press-4 line-3
//! ```
//!
//! The gateway writes the stream when `nats.servers` is set. The second argument names the consumer, which
//! keeps its place on the server; the third says after how many records to end, by default never.

#![allow(clippy::print_stdout, reason = "this is what the program is for")]

use std::error::Error;

use async_nats::jetstream::{self, consumer::pull};
use futures_util::StreamExt;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let datasource = arguments.next().ok_or("usage: consume DATASOURCE CONSUMER [RECORDS]")?;
    let durable = arguments.next().ok_or("usage: consume DATASOURCE CONSUMER [RECORDS]")?;
    let records = arguments.next().map_or(Ok(usize::MAX), |records| records.parse())?;
    let server = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222".to_owned());

    let jetstream = jetstream::new(async_nats::connect(server).await?);
    let stream = jetstream.get_stream("headgate").await?;
    let consumer = stream
        .get_or_create_consumer(
            &durable,
            pull::Config {
                durable_name: Some(durable.clone()),
                filter_subject: format!("stream.{datasource}.>"),
                ..Default::default()
            },
        )
        .await?;

    let mut messages = consumer.messages().await?.take(records);
    while let Some(message) = messages.next().await {
        let message = message?;
        let received_at = message.headers.as_ref().and_then(|headers| headers.get("Headgate-Received-At"));
        let received_at = received_at.map_or("", |time| time.as_str());
        println!("{received_at} {} {}", message.subject, String::from_utf8_lossy(&message.payload));
        // Acknowledged only now that it has been dealt with: a crash before this line brings it again.
        message.ack().await.map_err(|error| error as Box<dyn Error>)?;
    }
    Ok(())
}
